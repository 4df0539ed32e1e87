"""The front door for ONNX: passes on the ONNX graph, then a walk that turns it into Relax."""
