#!/bin/sh
# Stands for QEMU in tests: it is called by a link in a folder, whose files it plays. Each call is noted in `calls`, with the CPUs
# on which it runs. A machine with a debug port is a Linux with KVM; one with a module is nvmx with its guest.
here=$(dirname -- "$0")
[ "$1" = --version ] && { echo 'QEMU emulator version 9.2.0 (a script)'; exit 0; }
cpus=$(sed -n 's/^Cpus_allowed_list:\t//p' /proc/self/status)
printf '%s | %s\n' "$cpus" "$*" >>"$here/calls"
port=
for word; do
  case $word in file,id=debug,path=*) port=${word#file,id=debug,path=} ;; esac
done
if [ -n "$port" ]; then
  cat "$here/console" # COM1
  cat "$here/kvm" >"$port"
  while [ -e "$here/kvm-hangs" ]; do :; done
  exit 0
fi
case " $* " in
  *' -initrd '*) cat "$here/nvmx" ;;
  *) cat "$here/alone" ;;
esac
exit 33
