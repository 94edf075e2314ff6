# Three ways in (multiboot, multiboot2, PVH), all in 32-bit protected mode without paging, and one way on: to long mode
# with the first 4 GiB mapped one to one, then to kit_main(magic, info).

.set MB1_MAGIC, 0x1BADB002
.set MB1_FLAGS, 0x00010003          # modules on page boundaries, memory information, address fields
.set MB2_MAGIC, 0xE85250D6
.set PVH_MAGIC, 0x336EC578

.pushsection .boot.header, "a"
.balign 8
multiboot2_header:
    .long MB2_MAGIC, 0, multiboot2_header_end - multiboot2_header
    .long -(MB2_MAGIC + 0 + (multiboot2_header_end - multiboot2_header))
    .short 0, 0
    .long 8
multiboot2_header_end:
.balign 4
multiboot1_header:
    .long MB1_MAGIC, MB1_FLAGS, -(MB1_MAGIC + MB1_FLAGS)
    .long multiboot1_header, kit_image_start, kit_load_end, kit_image_end, kit_start

.popsection
.pushsection .note.kit, "a"
.balign 4
    .long 4, 4, 18                  # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long kit_start_pvh

.popsection
.pushsection .boot, "ax"
.code32
.global kit_start_pvh
kit_start_pvh:
    mov eax, PVH_MAGIC

.global kit_start
kit_start:
    cli
    cld
    lea esp, [kit_stack_end]
    mov edi, eax                    # arguments of kit_main
    mov esi, ebx

    # A CPU without long mode cannot go on: say nothing, stop.
    mov eax, 0x80000000
    cpuid
    cmp eax, 0x80000001
    jb kit_dead
    mov eax, 0x80000001
    cpuid
    test edx, 1 << 29
    jz kit_dead

    # 2048 pages of 2 MiB: present, writable, large
    lea ebp, [kit_page_tables]
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    mov [ebp + 0x2000 + ecx * 8], eax
    mov dword ptr [ebp + 0x2000 + ecx * 8 + 4], 0
    inc ecx
    cmp ecx, 2048
    jb 2b
    # four directories, one PDPT, one PML4
    lea eax, [ebp + 0x2003]
    xor ecx, ecx
3:  mov [ebp + 0x1000 + ecx * 8], eax
    mov dword ptr [ebp + 0x1000 + ecx * 8 + 4], 0
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jb 3b
    lea eax, [ebp + 0x1003]
    mov [ebp], eax
    mov dword ptr [ebp + 4], 0

    mov eax, 0x20                   # CR4.PAE
    mov cr4, eax
    mov cr3, ebp
    mov ecx, 0xC0000080             # EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80010033             # CR0: PG WP NE ET MP PE
    mov cr0, eax
    lgdt [kit_boot_gdtr]
    push 8
    lea eax, [kit_start64]
    push eax
    retf

kit_dead:
    hlt
    jmp kit_dead

.balign 8
kit_boot_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
kit_boot_gdtr:
    .short kit_boot_gdtr - kit_boot_gdt - 1
    .long kit_boot_gdt, 0

.code64
kit_start64:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, edi                    # the upper halves are undefined after the switch
    mov esi, esi
    lea rsp, [kit_stack_end]
    xor ebp, ebp
    call kit_main
    ud2

.popsection
.pushsection .bss.kit_boot, "aw", @nobits
.balign 4096
.global kit_page_tables
kit_page_tables:
    .skip 6 * 4096
.global kit_high_table
kit_high_table:
    .skip 4096
.global kit_stack
kit_stack:
    .skip 64 * 1024
.global kit_stack_end
kit_stack_end:
.popsection
