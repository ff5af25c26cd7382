"""Tests: unit/ and rpc/ need nothing; engine/ and faults/ run on the real engine and etcd of rig/."""
