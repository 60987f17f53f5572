"""Everything between text and token ids: tokenising, incremental detokenising, stop strings, chat templates."""
