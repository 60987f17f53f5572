"""One module per group of routes. A route validates, turns text into token ids, and hands over to server.serve."""
