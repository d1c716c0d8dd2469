"""What was spent and what was saved: `accounts` are sums in memory since the server started, `book` is what lasts.

recorder    a thread of each gateway process: events → `entry` (tokens, and money by `prices`) → `book`, and `telemetry`
query       which rows of the book, and by what they are summed up
allowance   what a tenant may still have, by `limits`; the counts are in `tallies`, which all processes of a server share
"""
