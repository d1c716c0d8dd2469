"""What the semantic level gives to questions whose truth is known, beside other ways of deciding (`bench semantic`)."""
