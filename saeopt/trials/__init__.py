"""Who tries what: the store and its queue, claims, signs of life, reports. Never touches a tensor.

What the queue promises, on SQLite (one host) and PostgreSQL (several), each with the test that holds it. The states of
a trial and their only allowed changes are `trials.states.TRANSITIONS`.

Creation
    A study and its whole queue appear in one transaction; the same spec again changes nothing, another one under the
    same name is refused, however many creators start at once.
    test_creation_is_idempotent_and_refuses_another_spec,
    test_twelve_workers_that_start_at_one_instant_on_a_fresh_store_share_the_cells
Claims
    A waiting trial is claimed by one worker, whatever starts at the same moment.
    test_packs_are_claimed_exactly_once
    Trials that are claimed together have the same stream and the same last checkpoint.
    test_a_claim_takes_the_first_waiting_trials_of_one_stream, test_trials_at_different_checkpoints_do_not_share_a_pack
    A stopped study gives no trials.
    test_a_stopped_study_gives_no_trials
Order
    The lowest number first; trials that had trouble come after the untouched ones and never join them.
    test_trials_that_had_trouble_come_after_the_untouched_and_never_join_them
Fencing
    Whoever has lost a claim can no longer report, give back, fail or end the trial, also when the study was deleted and
    another one has its key. A trial keeps its number and its run folder for life.
    test_a_lost_trial_keeps_its_number_and_the_zombie_can_do_nothing,
    test_a_claim_of_another_study_under_the_same_key_is_refused,
    test_a_worker_that_wakes_up_leaves_its_heirs_runs_as_they_are
    The state of a trial changes in one function, along the table, and only while the claim holds.
    test_a_move_that_the_table_does_not_know_is_refused, test_only_a_claim_that_holds_moves_its_trial,
    test_states_are_written_in_one_place
What counts against a trial
    A failure of the trial itself uses up a retry; then it fails.
    test_a_failed_trial_is_tried_again_until_its_retries_are_used_up
    What is given back (a signal, a fault of the host, too little memory together) counts nothing.
    test_a_released_trial_counts_nothing, test_a_fault_of_the_host_is_booked_on_no_trial_and_ends_the_worker,
    test_out_of_memory_halves_the_pack_and_counts_for_nobody
    Losses of its worker and deaths of its training process count until there is a new checkpoint.
    test_losses_count_until_a_new_checkpoint,
    test_three_deaths_without_a_checkpoint_in_between_fail_a_trial_and_a_retry_forgets_them
    After two losses a trial is trained alone: it may be what kills its worker.
    test_a_trial_that_was_lost_twice_is_claimed_alone
What a lost worker costs
    Its trials go back after `grace` seconds without a sign of life, judged by an observer's own clock; the next worker
    goes on from the last checkpoint. No living worker loses a trial.
    test_a_living_trial_is_not_reaped, test_a_heart_reaps_by_what_it_has_seen_itself,
    test_the_sign_of_a_dead_worker_whose_clock_ran_ahead_does_not_keep_its_trial
    Kills, and a database that restarts or is locked, lose nothing, double nothing, and change no bit of a result.
    test_kills_and_a_lost_database_change_nothing, test_a_database_that_restarts_loses_nothing
Refinement
    The trials that a study with `saes.target_l0: auto` adds come once, whoever ends last and whatever is killed.
    test_two_workers_add_the_refinement_once, test_what_a_killed_worker_left_undone_the_next_one_does
Results
    A result is stored in one transaction: values, constraints, attributes and state together, or nothing.
    test_a_result_is_stored_as_a_whole_or_not_at_all
"""
