"""What a run is judged by, before and after training, and the pages that tell of it.

Read `prompts` (sample prompts, the answers of the base and of the tuned model, exact match) and `losses` (did
the loss rise). Then the reports: `run_facts` reads what a run left behind, however damaged, `run_figures`
says what it comes to, `svg_plot` draws, and each rendering is a file: `report` (HTML, with `pages`),
`report_markdown`, `comparison` (several runs). The loss on held-out rows is computed in `inference.scoring`,
because a merge needs it too.

`prefix_scoring` computes log-likelihoods of choices, where what texts have in common is read once, and
`harness_model` is the model that lm-eval asks.

What `eval` measures: `settings` (what is asked), `scores` (a document at a time), `normalisation` (scores to
the columns of a table), `suites` (what can be asked of a model, and what each suite has to be able to do).
"""
