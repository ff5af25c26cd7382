"""Tests with faults: killed daemons, failing engine calls, outages, full disks; each checks the state afterwards."""
