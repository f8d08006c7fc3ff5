"""Domain values to protobuf and back: checks everything that comes in, opens no socket."""
