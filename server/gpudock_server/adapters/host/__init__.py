"""The host's operating system, for all adapters: processes, programs, threads, privileges, trees of files."""
