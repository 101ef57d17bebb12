"""What a server needs that has many tasks behind one backbone."""
