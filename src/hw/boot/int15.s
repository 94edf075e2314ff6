# INT 15h in L2's real mode: what the firmware would say of memory, without nvmx's. Copied to the start of a page below 1 MiB;
# what it answers is in the same page, from `data` on (boot::int15).
#
# ACPI specification, "System Address Map Interfaces": "INT 15H, E820H"; E801h and 88h as firmware of PCs has them.

.section .rodata.int15, "a", @progbits
.balign 16
.global int15_begin, int15_end
.set data, 0x200
.set old, data                          # far pointer to the handler that was there
.set count, data + 4                    # ranges
.set low, data + 6                      # KiB from 1 MiB to 16 MiB
.set high, data + 8                     # 64 KiB from 16 MiB on
.set extended, data + 10                # KiB from 1 MiB on
.set ranges, data + 16                  # base, length, type: 20 bytes each
.set SMAP, 0x534D4150

int15_begin:
.code16
    cmp ax, 0xE820
    je int15_e820
    cmp ax, 0xE801
    je int15_e801
    cmp ax, 0xE881                      # the same in 32 bits: not there
    je int15_fail
    cmp ah, 0x88
    je int15_88
    .byte 0x2E, 0xFF, 0x2E              # jmp far cs:[old], with an offset of 16 bits
    .short old

int15_e820:
    cmp edx, SMAP
    jne int15_fail
    cmp ecx, 20
    jb int15_fail
    cmp ebx, 0xFFFF
    ja int15_fail
    cmp bx, cs:[count]
    jae int15_fail
    push ds
    push si
    push di
    push cs
    pop ds
    imul si, bx, 20
    add si, ranges
    mov cx, 10
    cld                                 # the caller's flags come back with IRET
    rep movsw
    pop di
    pop si
    pop ds
    inc bx
    cmp bx, cs:[count]
    jb int15_more
    xor ebx, ebx
int15_more:
    mov ecx, 20
    mov eax, SMAP
    jmp int15_done

int15_e801:
    mov ax, cs:[low]
    mov cx, ax
    mov bx, cs:[high]
    mov dx, bx
    jmp int15_done

int15_88:
    mov ax, cs:[extended]

int15_done:
    push bp
    mov bp, sp
    and byte ptr [bp + 6], 0xFE         # the caller's CF
    pop bp
    iret

int15_fail:
    mov ah, 0x86
    push bp
    mov bp, sp
    or byte ptr [bp + 6], 1
    pop bp
    iret
.code64
int15_end:
.balign 8
.text
