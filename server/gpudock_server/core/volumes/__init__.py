"""Operations on volumes: drafts, sagas, and the checks that both share."""
