# From a start-up message to Rust: real mode at the start of a page below 1 MiB -> long mode with that page mapped one to
# one -> the upper half. Copied to the page as it is; what depends on the page is filled in (labels ap_*).
#
# SDM vol. 3A, "MP Initialization": CS = the page, IP = 0, interrupts off.

.section .rodata.ap, "a", @progbits
.balign 16
.global ap_begin, ap_end, ap_gdt_base, ap_far32, ap_far64, ap_tables, ap_stack, ap_block, ap_run, ap_root, ap_landing
ap_begin:
.code16
    jmp ap_16

.balign 8
ap_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # 08: 64-bit code
    .quad 0x00CF93000000FFFF            # 10: data
    .quad 0x00CF9B000000FFFF            # 18: 32-bit code
ap_gdt_pointer:
    .short 31
ap_gdt_base:
    .long ap_gdt - ap_begin
.balign 8
ap_far32:
    .long ap_32 - ap_begin
    .short 0x18
.balign 8
ap_far64:
    .long ap_64 - ap_begin
    .short 0x08
.balign 8
ap_tables:  .quad 0
ap_stack:   .quad 0
ap_block:   .quad 0
ap_run:     .quad 0
ap_root:    .quad 0
ap_landing: .quad 0
.set offset_gdt_pointer, ap_gdt_pointer - ap_begin
.set offset_far32, ap_far32 - ap_begin
.set offset_far64, ap_far64 - ap_begin
.set offset_tables, ap_tables - ap_begin
.set offset_stack, ap_stack - ap_begin
.set offset_block, ap_block - ap_begin
.set offset_run, ap_run - ap_begin
.set offset_root, ap_root - ap_begin
.set offset_landing, ap_landing - ap_begin

.code16
ap_16:
    cli
    cld
    xor ebx, ebx
    mov bx, cs
    mov ds, bx
    shl ebx, 4                          # EBX: the page
    lgdtd [offset_gdt_pointer]
    mov eax, cr0
    and eax, 0x9FFFFFFF                 # CD, NW: nvmx's memory is cached
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xFF, 0x2E              # jmp far [offset_far32], with an offset of 32 bits
    .short offset_far32
.code32
ap_32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    # SDM vol. 3A, "Initializing IA-32e Mode": CR4.PAE, CR3, EFER.LME (and NXE), CR0.PG (and WP).
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, [ebx + offset_tables]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x900
    wrmsr
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    .byte 0xFF, 0xAB                    # jmp far [ebx + offset_far64]
    .long offset_far64
.code64
ap_64:
    mov ebx, ebx                        # the upper half is undefined after the switch
    mov rsp, [rbx + offset_stack]
    mov rdi, [rbx + offset_block]
    mov rsi, [rbx + offset_run]
    mov rdx, [rbx + offset_root]
    mov rax, [rbx + offset_landing]
    xor ebp, ebp
    call rax
    ud2
ap_end:
.text
