"""Training data: files in, rows of tokens with labels out, and a summary of what happened on the way.

    sources -> formats -> chats -> tokenizing -> rows ----> selecting -> packing -> trainer
    files      which      one      ids and       Arrow on   validation,  full rows,
    or hub     layout?    shape    labels        disk       weights      boundaries
    sources finds files, readers reads each kind of them; json_files tells the forms of JSON apart, json_text
    reads JSON of any length in little memory
    formats reads a row with  columns  which column plays which part   turns  roles, contents, reasoning
                              keys     harmless, honoured, refused     roles  who speaks
                              values   JSON as text, empty, NaN        tool_calls   one form of a call
                              preferences   chosen and rejected        notes  counts for the report
                              chat_marks   text that was made ready for a model already
    mixing deals rows of several sources out in shares, for runs that mix them
    preparing runs these from the recipe, once: cache keeps what they made; bad_rows lists what could
    not be read; summary counts what each of them did; digests tell the rows of a source from others;
    shown is what a reader sees of them, as JSON

Read `preparing` first (the flow), then the files in the order of the box.
"""
