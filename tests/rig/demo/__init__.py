"""The main job on the terminal: `python -m tests.rig.demo`, or `make demo`."""
