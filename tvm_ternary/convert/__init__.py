"""From a model to a quantized one: samples, what calibration gathers, the job group by group, its checkpoint folder."""
