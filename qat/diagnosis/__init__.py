"""Why a quantized model is as good or as bad as it is."""
