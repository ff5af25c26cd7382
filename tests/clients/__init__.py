"""The client and the command, against a scripted server."""
