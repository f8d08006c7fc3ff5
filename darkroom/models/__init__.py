"""The torch side: which pipelines there are, how a stage loads its part of one, and how their forwards are batched."""
