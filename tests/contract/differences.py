"""Where a target is known to differ from the service, by the behaviour's name (its test's, without `test_`).

Each line is checked in both directions: the behaviour must differ on this target, and a line whose difference is
gone fails the suite. What is not listed must hold.
"""

from __future__ import annotations

from typing import Final

_BY_TARGET: Final[dict[str, dict[str, str]]] = {
    "kinesis-local": {
        "an_explicit_hash_key_outside_the_hash_space_is_refused": "HTTP 500 for a text",
        "more_than_500_entries_are_refused": "takes 501 entries",
        "no_entries_are_refused": "takes none",
        "an_entry_without_partition_key_is_refused": "refuses it as SerializationException",
        "the_partition_key_counts_against_the_one_mib": "counts the data alone",
        "a_sequence_number_of_another_shard_is_refused": "takes it",
        "an_iterator_that_nobody_gave_is_refused": "HTTP 500",
        "the_largest_record_of_a_stream_is_described_and_can_be_raised": "does not describe MaxRecordSizeInKiB",
        "the_filter_at_trim_horizon_gives_the_oldest_shards_only": "ignores this filter",
        "a_split_outside_the_range_is_refused": "splits at the shard's own first hash key",
    },
    "moto": {
        "results_come_in_the_order_of_the_entries": "numbers records 1, 2, 3 in each shard: not unique in the stream",
        "an_explicit_hash_key_leads_to_its_shard_up_to_the_edges": "HTTP 500 for the last hash key of a range",
        "an_explicit_hash_key_outside_the_hash_space_is_refused": "HTTP 500 for -1 and for a text",
        "sequence_numbers_are_186_bits_long_and_differ_between_shards": "numbers records 1, 2, 3 in each shard",
        "no_entries_are_refused": "takes none",
        "a_partition_key_has_1_to_256_characters": "takes an empty one",
        "a_record_of_more_than_one_mib_is_refused": "takes any length",
        "the_partition_key_counts_against_the_one_mib": "takes any length",
        "one_impossible_entry_refuses_the_request_and_nothing_is_written": "writes the entries before it",
        "limit_must_be_1_to_10_000": "takes 0 and 10,001",
        "an_answer_holds_at_most_ten_mib": "answers without a bound",
        "after_the_last_record_of_a_closed_shard_is_its_end": "never ends a shard",
        "a_timestamp_in_the_future_is_refused": "takes it",
        "a_sequence_number_of_another_shard_is_refused": "takes it",
        "a_text_that_is_no_sequence_number_is_refused": "HTTP 500",
        "a_sequence_number_iterator_needs_its_number": "HTTP 500",
        "an_iterator_that_nobody_gave_is_refused": "HTTP 500",
        "a_new_stream_is_creating_and_then_active": "has no state but ACTIVE",
        "the_largest_record_of_a_stream_is_described_and_can_be_raised": "does not know the operation",
        "shards_are_numbered_and_open_with_a_starting_sequence_number": "starts every shard at 0",
        "shards_are_listed_in_pages_by_the_token_alone": "InvalidToken, unless the first parameters are repeated",
        "a_token_beside_the_streams_name_is_refused": "requires it",
        "a_token_that_nobody_gave_is_refused": "answers that the stream None is not found",
        "shards_are_listed_after_a_shard": "ignores ExclusiveStartShardId",
        "the_filter_at_latest_gives_open_shards_only": "ignores filters",
        "the_filter_at_trim_horizon_gives_the_oldest_shards_only": "ignores filters",
        "the_filters_by_timestamp_leave_out_shards_that_were_closed_before": "ignores filters",
        "a_split_closes_the_parent_and_opens_two_children": "starts every shard at 0: a child is not behind its parent",
        "a_stream_that_splits_is_updating": "has no state but ACTIVE",
        "a_merge_opens_one_child_of_both_parents": "starts every shard at 0: a child is not behind its parents",
        "a_parent_ends_with_its_records_and_its_children": "never ends a shard, and writes on to closed ones",
        "a_parents_records_stay_readable_after_a_split": "writes on to closed shards",
        "both_merged_parents_end_with_the_one_child": "never ends a shard",
        "latest_on_a_closed_shard_is_its_end": "never ends a shard",
        "an_open_iterator_sees_the_end_of_its_shard": "never ends a shard",
        "the_shard_count_is_not_more_than_doubled_at_once": "takes any number",
    },
}

DIFFERENCES: Final[dict[tuple[str, str], str]] = {
    (target, behaviour): how for target, known in _BY_TARGET.items() for behaviour, how in known.items()
}
