"""What Roost decides, apart from how it is carried out: events in, actions out. No I/O, no clock."""
