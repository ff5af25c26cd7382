"""VolumeService: converts its requests to commands of core, and records to its messages."""
