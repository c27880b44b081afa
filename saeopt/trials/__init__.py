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
    In a study with rungs: full packs of survivors of the highest rung, what nobody has begun, parts of a pack of the
    highest rung; proposals of a sampler that learns after these, and trials that had trouble last.
    test_survivors_of_several_packs_wait_for_a_full_one_which_then_comes_first,
    test_the_highest_rung_comes_first_and_a_part_of_a_pack_after_what_nobody_has_begun,
    test_a_sampler_that_learns_gets_results_before_it_is_asked_again,
    test_trouble_and_loneliness_come_last_and_join_nobody
Rungs
    What all trials of a pack came to at a rung is stored before one of them is judged among everybody who came there.
    Who is killed before it was judged is judged by whoever claims it, and is trained no further if it is behind; who
    was judged and goes on is not judged there again.
    test_who_was_killed_before_its_verdict_is_judged_when_it_is_claimed
    A paused trial keeps its number and its checkpoint; nobody claims it, no sampler hears of it, until it is promoted
    or the study ends.
    test_a_paused_trial_is_claimed_by_nobody_until_it_is_promoted,
    test_no_sampler_sees_a_paused_trial_before_the_study_ends,
    test_only_a_claim_that_holds_pauses_its_trial
    At the end, where nothing runs and nothing may be begun, what is left of a budget goes to the best paused trials;
    then what is paused has been pruned, each once, and may be promoted by hand later.
    test_what_is_left_of_a_budget_goes_to_the_best_paused_trials,
    test_at_the_end_what_is_paused_has_been_pruned_and_may_still_be_promoted,
    test_without_their_checkpoints_trials_are_not_promoted_after_the_end
    Survivors of several packs that merge get the bits (on a CPU) of a pack that nobody disturbed, and so does what is
    promoted; kills and a lost database within rungs change nothing of that.
    test_survivors_merge_into_a_full_pack_and_get_the_bits_of_an_undisturbed_one,
    test_promoted_trials_go_on_to_the_bits_of_an_undisturbed_pack,
    test_kills_and_a_lost_database_within_rungs_change_nothing
    Older versions refuse a study with rungs in one line.
    test_older_versions_refuse_a_study_with_rungs_and_read_all_others
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
