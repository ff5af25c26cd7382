"""Operations on containers: drafts, sagas, and the checks and steps that they share."""
