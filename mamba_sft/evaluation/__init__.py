"""What a run is judged by, before and after training, and the pages that tell of it.

Read `prompts` (prompts with a check, the answers of the base and of the tuned model, exact match), `checks`
(constraints that code can verify) and `losses` (did the loss rise). Then the reports: `run_facts` reads what
a run left behind, however damaged, `run_figures` says what it comes to, `svg_plot` draws, and each rendering
is a file: `report` (HTML, with `pages`), `report_markdown`, `comparison` (several runs). The loss on held-out
rows is computed in `inference.scoring`, because a merge needs it too.

What `eval` measures: `settings` (what is asked), `scores` (a document at a time), `normalisation` (scores to
the columns of a table), `leaderboards` (what each asks), `suites` (what every suite has to be able to do) and
`suite_names` (which one a name means); `harness` (those that lm-eval runs; `task_files/` are ours for it)
with `task_names` (which names there are), `task_problems` (what stands in their way), `task_documents` (each
read once), `task_scores` (what lm-eval says of them), `around_lm_eval` (its chatter), `harness_model` (the
model that it asks) and `prefix_scoring` (log-likelihoods of choices, where what texts have in common is read
once); `heldout` and `instructions`,
which need no lm-eval. Then `measuring` is the flow: `preflight` (all that stands in the way), `results` (a
file that is whole at every moment), `paired` (two models on the same documents), `table`.
"""
