"""From a model to a quantized one: samples, what calibration gathers, the layer-by-layer job and its checkpoint folder."""
