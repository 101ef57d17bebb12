"""The adapter and all that it needs to load and run: exactly the files that travel with a remote-code checkpoint."""
