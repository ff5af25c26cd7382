"""The operating system of the host, for all adapters: processes, programs, threads, privileges, file trees."""
