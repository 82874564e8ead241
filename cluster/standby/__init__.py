"""What a process does while another coordinator leads: keep a replica, pass calls on, and take its place."""
