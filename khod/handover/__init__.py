"""What a handover is: its machine, its record, what the kernel shows of it, what it left and what arrived."""
