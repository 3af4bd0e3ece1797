"""One file per subject. The registry (`eval.protocols.metric`) finds every top-level `Metric` by itself.

To add a metric, add a file here and a test of its numbers. No file of this folder imports torch at its top.
"""
