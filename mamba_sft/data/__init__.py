"""Training data: files in, rows of tokens with labels out, and a summary of what happened on the way.

    sources -> formats -> chats -> tokenizing -> selecting -> packing -> trainer
    files      which      one      ids and       length,      full rows,
    or hub     layout?    shape    labels        validation,  boundaries
                                                 weights
    preparing runs these from the recipe; summary counts what each of them did;
    digests tell the rows of a source from others; shown is what a reader sees of them, as JSON

Read `preparing` first (the flow), then the files in the order of the box.
"""
