"""Records to messages, one file per resource. Pure; messages become commands in `validation`."""
