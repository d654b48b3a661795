# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest of 64 KiB that needs no firmware: it counts in its RAM, and writes each number on its serial line."""

import re
from pathlib import Path

COUNTER = 0x1000
"""The physical address of the number."""
SIZE = 1 << 16
LINE = re.compile(r"[0-9a-f]{8}")
DELAY = 200_000
"""Turns of an empty loop between two numbers: a few milliseconds under software emulation."""
BEGIN = b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
COUNT = b"".join(
    (
        b"\x66\xff\x06\x00\x10",  # next: inc dword [0x1000]
        b"\x66\xa1\x00\x10",  # mov eax, [0x1000]
        b"\xb9\x08\x00",  # mov cx, 8
        b"\x66\xc1\xc0\x04",  # digit: rol eax, 4
        b"\x88\xc3\x80\xe3\x0f",  # mov bl, al; and bl, 15
        b"\x80\xc3\x30\x80\xfb\x39",  # add bl, '0'; cmp bl, '9'
        b"\x76\x03\x80\xc3\x27",  # jbe $+5; add bl, 'a' - '0' - 10
        b"\x66\x50",  # push eax
        b"\xba\xfd\x03\xec\xa8\x20\x74\xfb",  # mov dx, 0x3fd; in al, dx; test al, 0x20; jz the in
        b"\xba\xf8\x03\x88\xd8\xee",  # mov dx, 0x3f8; mov al, bl; out dx, al
        b"\x66\x58\xe2\xd8",  # pop eax; loop digit
        b"\xba\xfd\x03\xec\xa8\x20\x74\xfb",  # as above
        b"\xba\xf8\x03\xb0\x0a\xee",  # mov dx, 0x3f8; mov al, '\n'; out dx, al
    )
)
SPIN = b"".join(
    (
        b"\x66\xb9" + DELAY.to_bytes(4, "little"),  # mov ecx, DELAY
        b"\x66\x49\x75\xfc",  # dec ecx; jnz the dec
    )
)
HALT = b"\xfb\xf4"  # sti; hlt
HANDLER = b"\x50\xb0\x20\xe6\x20\x58\xcf"  # push ax; mov al, 0x20; out 0x20, al (end of interrupt); pop ax; iret
MOVE_HANDLER = b"\xc7\x06\x80\x00"  # mov word [0x80], the handler's offset
TIMER = b"".join(
    (
        b"\xc7\x06\x82\x00\x00\xf0",  # mov word [0x82], 0xf000: the segment of vector 0x20
        *(
            b"\xb0" + value.to_bytes() + b"\xe6" + port.to_bytes()  # mov al, value; out port, al
            for port, value in (
                *((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01)),  # 8259: interrupt 0 is vector 0x20
                (0x21, 0xFE),  # all but interrupt 0 are masked
                *((0x43, 0x34), (0x40, 0), (0x40, 0)),  # 8254: one interrupt in 65536 ticks, 55 ms
            )
        ),
    )
)
RESET = b"\xea\x00\x00\x00\xf0"  # jmp 0xf000:0


def write_image(path: Path, *, idle: bool = False) -> Path:
    """Write the guest's image, for QEMU's -bios.

    An idle guest halts after each number, until the timer's interrupt; it needs `-cpu qemu64,-apic`.
    """
    turn = COUNT + (HALT if idle else SPIN)
    turn += b"\xeb" + (-len(turn) - 2).to_bytes(signed=True)  # jmp to its begin
    setup = b""
    if idle:
        handler = len(BEGIN) + len(MOVE_HANDLER) + 2 + len(TIMER) + len(turn)
        setup = MOVE_HANDLER + handler.to_bytes(2, "little") + TIMER
    body = BEGIN + setup + turn + HANDLER
    path.write_bytes(body.ljust(SIZE - 16, b"\xf4") + RESET.ljust(16, b"\xf4"))
    return path


def read_numbers(path: Path) -> list[int]:
    """Return the numbers that the guest has written, but for one that is not complete."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    assert all(map(LINE.fullmatch, lines)), lines
    return [int(line, 16) for line in lines]
