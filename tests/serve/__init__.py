"""The server in front of servers."""
