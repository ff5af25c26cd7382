"""Tests of `make install` and `make uninstall`, with DESTDIR and on a host as in README.md."""
