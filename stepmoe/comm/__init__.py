"""The only code that talks to other ranks: groups, placements, collectives, ledger."""
