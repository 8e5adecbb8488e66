"""A run's adapter and its base, summed into one checkpoint in the memory of one layer.

Read `merge_run` (the flow), then `request` (what is asked for, checked before torch is loaded),
`saved_adapter` (the adapter's files), `preparing` (what is merged, checked before a weight is read), `summed`
(the tensors, a block of rows at a time) and `check` (the result against base and adapter).
"""
