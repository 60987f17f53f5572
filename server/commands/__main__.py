"""``python -m server.commands``: ``collm`` where it is not installed."""

from server.commands import main

if __name__ == "__main__":
    main()
