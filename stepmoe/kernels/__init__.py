"""Operations worth a kernel of their own, each with its plain torch reference."""
