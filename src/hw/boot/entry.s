# From the loader to Rust: 32-bit protected mode, paging off, flat segments -> long mode at the upper half.
#
# Loaders agree on: EIP = entry, flat 4 GiB segments, A20 on, interrupts off.
#   multiboot, multiboot2: EAX = magic of the protocol, EBX = physical address of the boot information
#   PVH:                   EBX = physical address of the start information, EAX unspecified

# ---- what loaders look for -------------------------------------------------------------------------------------------

.section .boot.header, "a", @progbits

# Multiboot specification, "The layout of Multiboot header". Flags: 0 modules on page boundaries, 1 memory map, 16 address
# fields: they let loaders take a 64-bit ELF as a flat file.
.balign 4
boot_multiboot1:
    .long 0x1BADB002
    .long 0x00010003
    .long -(0x1BADB002 + 0x00010003)
    .long boot_multiboot1
    .long boot_load_start
    .long boot_load_end
    .long boot_bss_end
    .long boot_start

# Multiboot2 specification, "The layout of Multiboot2 header".
.balign 8
boot_multiboot2:
    .long 0xE85250D6
    .long 0
    .long boot_multiboot2_end - boot_multiboot2
    .long -(0xE85250D6 + 0 + (boot_multiboot2_end - boot_multiboot2))
    .balign 8
    .short 6, 0                         # modules on page boundaries
    .long 8
    .balign 8
    .short 0, 0                         # end of tags
    .long 8
boot_multiboot2_end:

# Xen, "x86/HVM direct boot ABI": note type 18 (XEN_ELFNOTE_PHYS32_ENTRY) holds the 32-bit entry point.
.section .note.pvh, "a", @note
.balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad boot_start_pvh

# ---- 32-bit code, where it was loaded --------------------------------------------------------------------------------

.section .boot.text, "ax", @progbits
.code32

.global boot_start_pvh
boot_start_pvh:
    mov eax, 0x336EC578                 # the magic of the start information stands for the protocol
.global boot_start
boot_start:
    cli
    cld
    mov esp, offset boot_stack_top_low
    mov ebp, eax                        # EBP: protocol, EBX: its information, until Rust gets them

    # Long mode? (CPUID.80000001H:EDX bit 29)
    mov esi, ebx
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000001
    jb boot_no_long_mode
    mov eax, 0x80000001
    cpuid
    bt edx, 29
    jnc boot_no_long_mode
    mov ebx, esi

    # Page tables, all zero so far (.bss): seven pages in a row.
    #   +0 PML4   0 -> PDPT, 256 -> PDPT (direct map), 511 -> PDPT of the image
    #   +1 PDPT   0..3 -> PD 0..3               +2 PDPT of the image   510 -> PD 0
    #   +3..6     PD 0..3: the first 4 GiB in 2 MiB pages
    mov edi, offset boot_pml4_low
    lea eax, [edi + 0x1000 + 3]
    mov [edi], eax
    mov [edi + 256 * 8], eax
    lea eax, [edi + 0x2000 + 3]
    mov [edi + 511 * 8], eax
    lea eax, [edi + 0x3000 + 3]
    mov [edi + 0x2000 + 510 * 8], eax
    xor ecx, ecx
2:  mov [edi + 0x1000 + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jb 2b
    xor ecx, ecx
    mov eax, 0x83                       # present, writable, 2 MiB
3:  mov [edi + 0x3000 + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jb 3b

    # SDM vol. 3A, "Initializing IA-32e Mode": CR4.PAE, CR3, EFER.LME, CR0.PG. CR0.WP too: read-only means read-only.
    # CR4 is nothing but PAE, whatever the loader left there: with LA57, paging would take these tables for others.
    mov eax, 0x20
    mov cr4, eax
    mov cr3, edi
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax

    lgdt [boot_gdt_pointer]
    push 0x08
    mov eax, offset boot_long
    push eax
    retf

# Says so on COM1 and ends: there is no Rust code for such a processor.
boot_no_long_mode:
    mov dx, 0x3FB                       # 115200 8N1, as hw::serial sets it
    mov al, 0x80
    out dx, al
    mov dx, 0x3F8
    mov al, 1
    out dx, al
    inc dx
    mov al, 0
    out dx, al
    mov dx, 0x3FB
    mov al, 3
    out dx, al
    mov esi, offset boot_no_long_mode_text
4:  mov dx, 0x3FD
5:  in al, dx
    test al, 0x20
    jz 5b
    lodsb
    test al, al
    jz 6f
    mov dx, 0x3F8
    out dx, al
    jmp 4b
6:  mov dx, 0x3FD                       # wait until the last byte is out
    in al, dx
    test al, 0x40
    jz 6b
    mov esi, offset boot_shutdown_text
    mov ecx, 8
    mov dx, 0x8900
    rep outsb
    mov al, 0x11
    out 0xF4, al
7:  hlt
    jmp 7b

boot_no_long_mode_text:
    .asciz "[nvmx ERROR] this CPU lacks long mode (CPUID.80000001H:EDX.LM = 0): nvmx needs a 64-bit Intel CPU with VT-x\r\n"
boot_shutdown_text:
    .ascii "Shutdown"

.balign 8
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # 08: 64-bit code
    .quad 0x00CF93000000FFFF            # 10: data
boot_gdt_pointer:
    .short 23
    .long boot_gdt

# ---- 64-bit code -----------------------------------------------------------------------------------------------------

.code64
boot_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, ebp                        # zero-extends: the upper halves are undefined after the switch
    mov esi, ebx
    movabs rsp, offset boot_stack_top
    xor ebp, ebp
    movabs rax, offset {rust_entry}
    call rax
    ud2

.section .bss.boot, "aw", @nobits
.balign 4096
.global boot_pml4
boot_pml4:
    .zero 7 * 4096
.global boot_stack_end
boot_stack_end:
.global boot_stack_top
    .zero 0x40000
boot_stack_top:

.text
