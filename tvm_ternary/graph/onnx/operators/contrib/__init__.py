"""Operators of onnxruntime's ``com.microsoft`` set, which its optimizer and its model builders write."""
