"""What a run is judged by, before and after training, and the pages that tell of it.

Read `prompts` (prompts with a check, the answers of the base and of the tuned model, exact match), `checks`
(constraints that code can verify) and `losses` (did the loss rise). Then the reports: `run_facts` reads what
a run left behind, however damaged, `run_figures` says what it comes to, `svg_plot` draws, and each rendering
is a file: `report` (HTML, with `pages`), `report_markdown`, `comparison` (several runs). The loss on held-out
rows is computed in `inference.scoring`, because a merge needs it too.

What `eval` measures: `settings` (what is asked), `scores` (a document at a time), `normalisation` (scores to
the columns of a table), `suites` (what can be asked of a model, and what each suite has to be able to do).
`heldout` and `instructions` are suites of our own. `harness_model` is the model that lm-eval asks, with
`prefix_scoring`: likelihoods of choices, where what texts begin with alike is read once.
"""
