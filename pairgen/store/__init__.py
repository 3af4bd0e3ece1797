"""The pair store on disk (docs/pair-format.md): spec, HDF5 shards, writer, reader, and data set.

The classes to use are exported by `pairgen`.
"""
