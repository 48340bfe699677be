"""The equations of the recurrent units, one file each: see `rnnattn.recurrent.unit`."""
