# Out of long mode into a 32-bit world of the test's own, one trigger there, and back.
#
# Everything that is reached there notes itself: vmxtest_tasks_log gets an id, then what the notes push, from the lowest
# address of the stack on, then 11 words above that (of a trap: vector, error code, EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS).

.pushsection .bss.vmxtest_tasks, "aw", @nobits
.balign 64
.global vmxtest_tasks_context
vmxtest_tasks_context:
c_rsp:      .skip 16
c_gdtr:     .skip 16
c_idtr:     .skip 16
c_cr3:      .skip 8
c_cr4:      .skip 8
# from 0x40 on: set by the test
n_cr4:      .skip 4
n_cr3:      .skip 4
n_cr0:      .skip 4
            .skip 4
n_gdtr:     .skip 8
n_idtr:     .skip 8
n_esp:      .skip 4
n_tr:       .skip 4
n_eflags:   .skip 4
n_ldt:      .skip 4
n_dr7:      .skip 4
n_trigger:  .skip 4
n_far:      .skip 8
n_then:     .skip 4
n_log:      .skip 4
n_busy:     .skip 4
n_log_end:  .skip 4
n_value:    .skip 4
.popsection

.pushsection .text.vmxtest_tasks, "ax"
.code64
.global vmxtest_tasks_run
vmxtest_tasks_run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    cli
    mov [c_rsp], rsp
    sgdt [c_gdtr]
    sidt [c_idtr]
    mov rax, cr3
    mov [c_cr3], rax
    mov rax, cr4
    mov [c_cr4], rax
    xor eax, eax
    mov cr2, rax
    push 0x28
    lea rax, [down]
    push rax
    retfq

.code32
down:
    mov eax, cr0
    and eax, 0x7FFEFFF7             # PG WP TS
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    and eax, 0xFFFFFEFF             # LME
    wrmsr
    mov eax, [n_cr4]
    mov cr4, eax
    mov eax, [n_cr3]
    mov cr3, eax
    mov eax, cr0
    or eax, [n_cr0]
    mov cr0, eax
    lgdt [n_gdtr]
    lidt [n_idtr]
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov esp, [n_esp]
    .byte 0xEA
    .long 1f
    .short 8
1:  lldt word ptr [n_ldt]
    ltr word ptr [n_tr]
    mov eax, 0xFFFF0FF0
    mov dr6, eax
    mov eax, [n_dr7]
    mov dr7, eax
    push dword ptr [n_eflags]
    mov eax, 0xA1A1A1A1
    mov ecx, 0xC2C2C2C2
    mov edx, 0xD3D3D3D3
    mov ebx, 0xB4B4B4B4
    mov ebp, 0xB5B5B5B5
    mov esi, 0x56565656
    mov edi, 0xD7D7D7D7
    popfd
    jmp dword ptr [n_trigger]

.global vmxtest_tasks_jmp, vmxtest_tasks_call, vmxtest_tasks_int, vmxtest_tasks_int3, vmxtest_tasks_ud
.global vmxtest_tasks_gp, vmxtest_tasks_pf, vmxtest_tasks_iret, vmxtest_tasks_interrupt, vmxtest_tasks_nmi
.global vmxtest_tasks_long_mode, vmxtest_tasks_cr3
vmxtest_tasks_jmp:
    jmp fword ptr [n_far]
    jmp land_back
vmxtest_tasks_call:
    call fword ptr [n_far]
    jmp land_back
vmxtest_tasks_int:
    int 0x30
    jmp land_back
vmxtest_tasks_int3:
    int3
    jmp land_back
vmxtest_tasks_ud:
    ud2
vmxtest_tasks_gp:
    mov ax, 0xFFF8
    mov fs, ax
vmxtest_tasks_pf:
    mov eax, [0xC03FF000]
vmxtest_tasks_iret:
    iretd
    jmp land_back
vmxtest_tasks_interrupt:
    mov dword ptr [0xFEE00300], 0x00044032
    .rept 32
    nop
    .endr
    jmp land_back
vmxtest_tasks_nmi:
    mov eax, [0xFEE00020]
    mov [0xFEE00310], eax
    mov dword ptr [0xFEE00300], 0x00004400
    .rept 32
    nop
    .endr
    jmp land_back

# Into long mode, with a change of CR0.NE, which a hypervisor below may own.
vmxtest_tasks_long_mode:
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xFFFFFFDF
    mov cr0, eax
    or eax, 0x80000020
    mov cr0, eax
    jmp land_back
vmxtest_tasks_cr3:
    mov eax, [n_value]
    mov cr3, eax
    jmp land_back

# Where a task goes on after its trigger.
land_back:
    pushfd
    pushad
    mov ebx, 2
    jmp note

# Where the new tasks begin. Position-independent: one of them has a code segment that begins here.
.balign 16
.global vmxtest_tasks_land, vmxtest_tasks_land_user, vmxtest_tasks_end
vmxtest_tasks_land:
    pushfd
    pushad
    mov ebx, 1
    jmp note

# A task in ring 3.
.balign 16
vmxtest_tasks_land_user:
    int 0x31

land_trap:
    pushfd
    pushad
    mov ebx, 0x100

note:
    mov eax, ss
    push eax
    mov eax, ds
    push eax
    mov eax, es
    push eax
    mov eax, fs
    push eax
    mov eax, gs
    push eax
    xor eax, eax
    str ax
    push eax
    sldt ax
    push eax
    mov eax, cr0
    push eax
    mov eax, cr2
    push eax
    mov eax, cr3
    push eax
    mov eax, dr6
    push eax
    mov eax, dr7
    push eax
    mov esi, esp
    mov eax, ss
    lar ecx, eax
    test ecx, 1 << 22
    jnz 1f
    movzx esi, sp
1:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    cld
    mov edi, [n_log]
    mov eax, ebx
    stosd
    mov ecx, 32
1:  mov eax, ss:[esi]
    add esi, 4
    stosd
    dec ecx
    jnz 1b
    mov [n_log], edi
    cmp edi, [n_log_end]            # nothing but traps
    ja vmxtest_tasks_end
    cmp dword ptr [n_then], 0
    je vmxtest_tasks_end
    dec dword ptr [n_then]
    add esp, 48                     # the notes
    popad
    popfd
    iretd
    pushfd
    pushad
    mov ebx, 3
    jmp note

vmxtest_tasks_end:
    .byte 0xEA
    .long 1f
    .short 8
1:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, [n_esp]
    mov eax, 0x90                   # long mode is not entered with a 16-bit TSS
    ltr ax
    mov eax, 0x400
    mov dr7, eax
    mov eax, cr0
    and eax, 0x7FFFFFF7
    mov cr0, eax
    mov eax, [c_cr4]
    mov cr4, eax
    mov eax, [c_cr3]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80010020
    mov cr0, eax
    lgdt [c_gdtr]
    .byte 0xEA
    .long 1f
    .short 8
.code64
1:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lldt ax
    lidt [c_idtr]
    mov eax, [n_busy]
    and byte ptr [rax], 0xFD
    mov eax, 0x30
    ltr ax
    mov rsp, [c_rsp]
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# One entry of 16 bytes a vector.
.code32
.balign 16
.global vmxtest_tasks_vectors
vmxtest_tasks_vectors:
.set vector, 0
.rept 0x34
.balign 16
.if (vector != 8) && ((vector < 10) || (vector > 14)) && (vector != 17)
    push 0
.endif
    push vector
    jmp land_trap
.set vector, vector + 1
.endr
.code64
.popsection
