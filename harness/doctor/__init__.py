"""The verb `doctor`: is this machine, this installation and this record in order? A file of checks per theme."""
