"""What every call passes through: errors, audit, identity, decoding."""
