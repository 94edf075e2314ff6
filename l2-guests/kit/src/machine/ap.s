# Where a CPU begins that another one starts: in real mode, at AP_PAGE, whose start is a copy of this. It notes the state it
# finds, for whoever wants to know what an INIT leaves, and goes on to kit_ap_main in long mode.

.set AP_PAGE, 0x70000
.set AP_STACK, 0x7F8
.set AP_INDEX, 0x7F0
.set AP_STATE, 0x800                # 32-bit words, in the order of smp::STATE

.pushsection .rodata.kit_ap, "a"
.balign 16
.global kit_ap_begin, kit_ap_end
kit_ap_begin:
.code16
    jmp kit_ap_16
.balign 8
kit_ap_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
kit_ap_gdtr:
    .short 31
    .long AP_PAGE + (kit_ap_gdt - kit_ap_begin)
.set kit_ap_gdtr_offset, kit_ap_gdtr - kit_ap_begin

kit_ap_16:
    mov cs:[AP_STATE], eax
    mov cs:[AP_STATE + 4], ebx
    mov cs:[AP_STATE + 8], ecx
    mov cs:[AP_STATE + 12], edx
    mov cs:[AP_STATE + 16], esp
    mov cs:[AP_STATE + 20], ebp
    mov cs:[AP_STATE + 24], esi
    mov cs:[AP_STATE + 28], edi
    mov cs:[AP_STATE + 32], cs
    mov cs:[AP_STATE + 36], ds
    mov cs:[AP_STATE + 40], es
    mov cs:[AP_STATE + 44], ss
    mov cs:[AP_STATE + 48], fs
    mov cs:[AP_STATE + 52], gs
    sgdt cs:[AP_STATE + 56]
    sidt cs:[AP_STATE + 64]
    mov ax, cs
    mov ds, ax
    mov ss, ax
    mov esp, 0x7F0
    pushfd
    pop dword ptr [AP_STATE + 72]
    mov eax, cr0
    and eax, 0x9FFFFFFF             # CD and NW are what firmware left
    mov [AP_STATE + 76], eax
    mov eax, cr2
    mov [AP_STATE + 80], eax
    mov eax, cr3
    mov [AP_STATE + 84], eax
    mov eax, cr4
    mov [AP_STATE + 88], eax
    mov eax, dr0
    mov [AP_STATE + 92], eax
    mov eax, dr6
    mov [AP_STATE + 96], eax
    mov eax, dr7
    mov [AP_STATE + 100], eax
    mov ecx, 0xC0000080
    rdmsr
    mov [AP_STATE + 104], eax
    lgdtd [kit_ap_gdtr_offset]
    mov eax, cr0
    and eax, 0x9FFFFFFF
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xEA                # jmp far, with an offset of 32 bits
    .long AP_PAGE + (kit_ap_32 - kit_ap_begin)
    .short 0x18
.code32
kit_ap_32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, 0x20                   # CR4.PAE
    mov cr4, eax
    lea eax, [kit_page_tables]
    mov cr3, eax
    mov ecx, 0xC0000080             # EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80010033             # CR0: PG WP NE ET MP PE
    mov cr0, eax
    .byte 0xEA                      # jmp far
    .long AP_PAGE + (kit_ap_64 - kit_ap_begin)
    .short 8
.code64
kit_ap_64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov ebx, AP_PAGE
    mov rsp, [rbx + AP_STACK]
    mov rdi, [rbx + AP_INDEX]
    xor ebp, ebp
    movabs rax, offset kit_ap_main
    call rax
    ud2
kit_ap_end:
.popsection
