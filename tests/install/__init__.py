"""`make install` and `make uninstall`: below DESTDIR, and on a host as README.md says."""
