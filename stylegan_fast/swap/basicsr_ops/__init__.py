"""What the import hook executes under the names of `basicsr.ops.fused_act.fused_act` and
`basicsr.ops.upfirdn2d.upfirdn2d`, and of the modules of an early copy of rosinality's `op`."""
